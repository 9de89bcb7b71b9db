"""Teachers that run beside the student; a teacher read from files is `cbd_trl.cache.reader.CachedTeacher`."""
