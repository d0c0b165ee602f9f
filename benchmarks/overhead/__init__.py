"""What a federation costs: the same work by this project, one plain process, Flower and NVFlare's own simulator."""
