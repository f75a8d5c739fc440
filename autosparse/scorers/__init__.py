"""The learned criterion: records of IRP runs, features, networks, fitting."""
