"""Serving in virtual time: the real engine, pipelines whose steps take what a cost model says, clients, losses."""
