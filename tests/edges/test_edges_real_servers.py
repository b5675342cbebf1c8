"""Servers that people really use: launched, ready, used, stopped; every worker gone, and the port free."""

from __future__ import annotations

import http.client
import shutil
import socket
import sys
from typing import TYPE_CHECKING

import processes
import pytest
from servers.commands import FOLDER, READY_S

import harness

if TYPE_CHECKING:
    from pathlib import Path

NGINX_CONFIG = """
pid DIR/nginx.pid;
error_log stderr;
worker_processes 2;
events {}
http {
    access_log off;
    client_body_temp_path DIR/body;
    proxy_temp_path DIR/proxy;
    fastcgi_temp_path DIR/fastcgi;
    uwsgi_temp_path DIR/uwsgi;
    scgi_temp_path DIR/scgi;
    server {
        listen 127.0.0.1:PORT;
        location / { return 200 "from nginx"; }
    }
}
"""
needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")


def get(server: harness.Server) -> str:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.status == 200
        return response.read().decode()
    finally:
        connection.close()


def stop(server: harness.Server, *, at_least: int, returncode: int = 0) -> None:
    """Stop a server, and look that its whole tree is gone and its port can be listened on."""
    people = processes.identities(server.pids())
    assert len(people) >= at_least
    outcome = server.stop()
    assert (outcome.how, outcome.returncode) == ("asked", returncode)
    assert not [who for who in people if processes.is_running(who)]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((server.host, server.port), timeout=1)


def test_uvicorn_with_workers(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(
        [
            sys.executable,
            "-m",
            "uvicorn",
            "asgi_app:app",
            "--app-dir",
            str(FOLDER),
            "--workers",
            "2",
            "--port",
            "{port}",
        ],
        ready=harness.http_ok("/"),
    ).wait_ready(READY_S)
    assert int(get(server)) in server.pids()
    stop(server, at_least=3)


def test_gunicorn(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(
        [sys.executable, "-m", "gunicorn", "-w", "2", "-b", "{host}:{port}", "--chdir", str(FOLDER), "wsgi_app:app"],
        ready=harness.http_ok("/"),
    ).wait_ready(READY_S)
    assert int(get(server)) in server.pids()
    stop(server, at_least=2)


@needs_redis
def test_redis(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    command = ["redis-server", "--port", "{port}", "--bind", "{host}", "--save", "", "--dir", str(tmp_path)]
    server = watchdog.launch(command, ready=harness.port_open()).wait_ready(READY_S)
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(100) == b"+PONG\r\n"
    stop(server, at_least=1)


def nginx(watchdog: harness.Watchdog, directory: Path, daemon: str) -> harness.Server:
    """Launch nginx with a configuration in which a shell fills in the port."""
    (directory / "nginx.in").write_text(NGINX_CONFIG.replace("DIR", str(directory)), encoding="utf-8")
    script = 'sed "s/PORT/$1/" nginx.in > nginx.conf && exec nginx -p "$PWD" -c nginx.conf -e stderr -g "$2"'
    return watchdog.launch(
        ["sh", "-c", script, "sh", "{port}", f"daemon {daemon};"],
        cwd=directory,
        env={"PATH": "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"},
        ready=harness.http_ok("/"),
        name="nginx",
    ).wait_ready(READY_S)


@needs_nginx
def test_nginx_in_the_foreground(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    server = nginx(watchdog, tmp_path, "off")
    assert get(server) == "from nginx"
    assert server.state == "running"
    stop(server, at_least=2)


@needs_nginx
def test_nginx_as_a_daemon(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    server = nginx(watchdog, tmp_path, "on")
    assert get(server) == "from nginx"
    assert server.proc.wait(READY_S) == 0  # its workers may answer before the process that was launched has exited
    assert server.state == "detached"
    master = int((tmp_path / "nginx.pid").read_text(encoding="ascii"))
    assert master in server.pids()
    assert server.pid not in server.pids()
    stop(server, at_least=2)


def test_pythons_own_http_server(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "http.server", "{port}", "--bind", "{host}", "--directory", str(tmp_path)]
    server = watchdog.launch(command, ready=harness.http_ok("/")).wait_ready(READY_S)
    assert "Directory listing" in get(server)
    stop(server, at_least=1, returncode=-15)
