"""The doctor: finds out what is wrong between a server and its clients, and says what to change.

`probes` gathers facts over HTTP, `diagnoses` turns facts into findings, and `rendering` into text or JSON. Internal,
and knows no Flask: `flask.doctor` adds what can be seen inside of an app. See "The doctor"
in docs/explanation/architecture.md.
"""
