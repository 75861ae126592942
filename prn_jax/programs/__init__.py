"""The programs: each module has its flags and what they are for, and `cli` runs it by name."""
