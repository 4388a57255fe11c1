# gunicorn --config gunicorn.conf.py app:app
# It listens on 127.0.0.1:8000. If the environment has a PORT, as in the Dockerfile, it listens there on all addresses.
worker_class = "gthread"
workers = 1  # more only with Redis (FLASK_SSE_BACKEND)
threads = 16  # for other requests: an open stream holds none
graceful_timeout = 10  # seconds that other requests get to finish; streams end within 5 s
control_socket_disable = True  # of gunicorn 25 and later: it would be in the home directory, which services often lack
