"""Transport port over grpc.aio: Links and bulk streams between members, with mutual TLS."""

from meshgpu.adapters.grpc_link.transport import GrpcLink

__all__ = ["GrpcLink"]
