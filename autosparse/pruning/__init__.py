"""How masks come about: criteria, `prune`, and the methods that search by training."""
