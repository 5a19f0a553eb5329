"""Studies of many short trainings: what is run, kept and resumed, and what is concluded."""
