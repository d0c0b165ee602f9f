"""The runtime `simulator`: one job in NVFlare's simulator."""
