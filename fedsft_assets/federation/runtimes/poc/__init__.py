"""The runtime `poc`: an NVFlare system of processes on this machine."""
