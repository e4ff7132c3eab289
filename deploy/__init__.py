import os

# gRPC's C core writes its own lines to stderr, beside the one in which we say what is wrong. It reads this when it is
# loaded, so it has to be set before anything imports grpc.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
