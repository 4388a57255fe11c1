"""Apps that tests give to real servers. The servers import them by name, such as ``serverapp``, from this folder."""
