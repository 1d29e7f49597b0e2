"""`octavo calibrate`: what this machine can do, and the coefficients of the cost model that come of it."""
