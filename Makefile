.PHONY: proto
PY := .venv/bin/python

proto:  ## Regenerate protos/gen from protos/engine.proto
	$(PY) -m grpc_tools.protoc -I protos --python_out=protos/gen --pyi_out=protos/gen protos/engine.proto
