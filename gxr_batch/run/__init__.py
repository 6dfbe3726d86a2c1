"""The main job, from a job file to a finished run folder, and the two verbs that look at one: `check` and `status`."""
