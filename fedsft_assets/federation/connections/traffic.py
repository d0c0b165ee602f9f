"""Counts what a job's process at a site exchanges with its server: every frame on their connections."""

from typing import Any

from nvflare.fuel.f3.cellnet.fqcn import FQCN

from fedsft_assets.federation.protocol.meter import Meter


def count_traffic(cell: Any, meter: Meter) -> None:
    """From now on, count the frames between a cell, NVFlare's `CoreCell`, and the server.

    A frame is counted once its connection has taken it, or when it arrives, in full: tensors, messages and heartbeats
    with their headers, but not what the connection adds (TLS, HTTP/2 or WebSocket, TCP).
    """
    manager = cell.communicator.conn_manager
    process_frame, begin = manager.process_frame, manager.handle_new_connection

    def received(connection: Any, frame: Any) -> None:
        if _leads_to_server(connection):
            meter.received(len(frame))
        process_frame(connection, frame)

    def count_sent(connection: Any) -> None:
        send_frame = connection.send_frame

        def sent(frame: Any) -> None:
            send_frame(frame)
            if _leads_to_server(manager.sfm_conns.get(connection.name)):
                meter.sent(len(frame))

        connection.send_frame = sent

    def begun(connection: Any) -> None:
        count_sent(connection)
        begin(connection)

    for known in list(manager.sfm_conns.values()):
        count_sent(known.conn)
    manager.process_frame, manager.handle_new_connection = received, begun


def _leads_to_server(connection: Any) -> bool:
    """Whether the peer of an `SfmConnection` is the server; until it has said who it is, nobody's."""
    endpoint = connection and connection.sfm_endpoint
    return endpoint is not None and FQCN.get_root(endpoint.endpoint.name) == FQCN.ROOT_SERVER
