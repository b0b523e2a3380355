"""The mathematics: noise processes, denoisers, guidance, solvers, losses, averages."""
