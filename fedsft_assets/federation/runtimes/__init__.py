"""Where jobs run: NVFlare's simulator, a POC on this machine, or a production federation."""
