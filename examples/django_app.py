"""Django: `stream()` stands beside Django's WSGI application, and Django decides which requests may see it.

A view that returns `StreamingHttpResponse(body, headers=dict(headers))` works, too. But a stream that stays attached
then keeps the request's database connection for as long as it is open; beside Django it does not.

Run `pip install django` and `python examples/django_app.py`, and open http://127.0.0.1:5000 in several windows.
"""

import itertools
import os
import secrets

from django.conf import settings
from django.core.handlers.wsgi import WSGIRequest
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse, HttpResponseForbidden, HttpResponseRedirect
from django.template import RequestContext, Template
from django.urls import path
from django.views.decorators.http import require_GET, require_POST
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import run_simple

from sse_batcher import SSEManager, script, stream

settings.configure(
    SECRET_KEY=secrets.token_urlsafe(50),
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    ROOT_URLCONF=__name__,
    MIDDLEWARE=["django.middleware.common.CommonMiddleware", "django.middleware.csrf.CsrfViewMiddleware"],
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
)
manager = SSEManager()

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Django</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
  body { max-width: 36rem; margin: 2rem auto; padding: 0 1rem; }
  form { display: inline; }
  button { font: inherit; }
</style>
<h1>Django</h1>
{% if guest %}
  <form id="press">{% csrf_token %}<button>Press</button></form>
  <form method="post" action="/logout">{% csrf_token %}<button>Leave</button></form>
  <p>Pressed <b id="presses">?</b> times, seen in <b id="windows">?</b> windows.</p>
  <script type="module">
    import { BatchedEventSource } from "/events/sse-batcher.js";

    const events = new BatchedEventSource("/events");
    events.on("press", (data) => {
      document.getElementById("presses").textContent = data.presses;
      document.getElementById("windows").textContent = data.windows;
    });

    const form = document.getElementById("press");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      fetch("/press", {method: "POST", body: new FormData(form)});
    });
  </script>
{% else %}
  <form method="post" action="/login">{% csrf_token %}<button>Come in</button></form>
{% endif %}
"""


def is_guest(request):
    """Whether Django gave this browser the cookie. The signature says so, without a session, middleware or database."""
    return request.get_signed_cookie("guest", default=None, salt="stream", max_age=8 * 3600) is not None


@require_GET
def page(request):
    return HttpResponse(Template(PAGE).render(RequestContext(request, {"guest": is_guest(request)})))


@require_POST
def login(request):
    response = HttpResponseRedirect("/")
    # Set it where the user logs in, and delete it where they log out. What the stream has to know of them, an id or
    # their channels, can be its value.
    response.set_signed_cookie("guest", "yes", salt="stream", max_age=8 * 3600, httponly=True, samesite="Lax")
    return response


@require_POST
def logout(request):
    response = HttpResponseRedirect("/")
    response.delete_cookie("guest", samesite="Lax")
    return response


presses = itertools.count(1)


@require_POST
def press(request):
    if not is_guest(request):
        return HttpResponseForbidden()
    manager.enqueue("press", {"presses": next(presses), "windows": manager.get_stats().clients})
    return HttpResponse(status=204)


urlpatterns = [path("", page), path("login", login), path("logout", logout), path("press", press)]


def events(environ, start_response):
    if is_guest(WSGIRequest(environ)):
        status, headers, body = stream(manager, environ, ["default"])
    else:
        status, headers, body = "403 Forbidden", [("Content-Type", "text/plain")], [b"come in first\n"]
    start_response(status, headers)
    return body


def module(environ, start_response):
    status, headers, body = script(environ)
    start_response(status, headers)
    return body


mounted = {"/events": events, "/events/sse-batcher.js": module}
application = DispatcherMiddleware(get_wsgi_application(), mounted)

if __name__ == "__main__":
    run_simple("127.0.0.1", int(os.environ.get("PORT", "5000")), application, threaded=True)
    manager.shutdown()
