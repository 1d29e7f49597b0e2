"""What the processes of a cell call each other in the mesh. Workers and ingress replicas have names of their own."""

ENGINE = "engine"
ROUTER = "router"
