"""What is run: the command line, sweeps and their run folders, reproductions and reports."""
