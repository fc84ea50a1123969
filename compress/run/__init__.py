"""The run folder: stages and seals, lock, whole files, hashes, progress; what the machine is and has."""
