"""`build(args)`: the Serve application. The import_path in deployments/config.yaml."""

import time
from typing import Any

from ray.serve import Application

from serve_app.cluster.driver import end_serve_run
from serve_app.cluster.engine import ENGINE_DEPLOYMENT
from serve_app.config import parse_config
from serve_app.errors import OctavoError
from serve_app.ingress.deployment import INGRESS_DEPLOYMENT
from serve_app.ingress.keys import check_keys
from serve_app.runtime.settings import check


def build(args: dict[str, Any]) -> Application:
    """Check everything that can be known before an actor starts, then bind the deployments.

    What cannot run ends `serve run` with one sentence; the same sentence is the application's status in Serve.
    """
    try:
        config = parse_config(args)
        spec = check(config)
        check_keys(config.security.keys_file)
    except OctavoError as error:
        end_serve_run(str(error))
        raise
    engine = ENGINE_DEPLOYMENT.bind(config, spec)
    created_s = int(time.time())
    app: Application = INGRESS_DEPLOYMENT.options(num_replicas=config.num_ingress).bind(config, spec, created_s, engine)
    return app
