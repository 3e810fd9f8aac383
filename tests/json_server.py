"""An HTTP server in a thread that answers each POST as a test says."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JsonServer:
    "`respond(path, body)` of a subclass returns status, headers and body, as bytes or as JSON."

    def __init__(self):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler):
                asked = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                status, headers, out = self.respond(handler.path, asked)
                data = out if isinstance(out, bytes) else json.dumps(out).encode()
                handler.send_response(status)
                standard = {"Content-Type": "application/json", "Content-Length": str(len(data))}
                for key, value in (standard | headers).items():
                    handler.send_header(key, value)
                handler.end_headers()
                handler.wfile.write(data)

            def log_message(handler, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *args: None  # a client that left
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()
