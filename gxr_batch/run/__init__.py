"""The main job, from a job file to a finished run folder, and the commands `check` and `status`."""
