import mtpd_jax  # noqa: F401  (first: what it does about Ctrl-C while a command imports)
