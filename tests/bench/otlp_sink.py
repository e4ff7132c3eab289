"""A trace collector that only counts: real gRPC, so that exporting costs the gateway what it costs in earnest.

python -m tests.bench.otlp_sink --port 4399 --count-file spans.txt
"""

from __future__ import annotations

import argparse
import signal
import threading
from concurrent import futures
from pathlib import Path

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc


class Sink(pb_grpc.TraceServiceServicer):
    """Keeps the number of spans received so far in `count_file`."""

    def __init__(self, count_file: Path) -> None:
        self._count_file = count_file
        self._spans = 0

    def Export(self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext) -> object:
        self._spans += sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        self._count_file.write_text(str(self._spans))
        return pb.ExportTraceServiceResponse()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--count-file", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.count_file.write_text("0")
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    pb_grpc.add_TraceServiceServicer_to_server(Sink(arguments.count_file), server)
    server.add_insecure_port(f"127.0.0.1:{arguments.port}")
    server.start()
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    stopped.wait()
    server.stop(None)


if __name__ == "__main__":
    main()
