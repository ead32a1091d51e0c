"""The verbs of the command line, grouped by stage; each imports its step only when it is called."""
