"""The command `octavo simulate serve`: a load test in virtual time, from a plan or a measured pace."""
