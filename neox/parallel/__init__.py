"""Layouts over processes: the mesh, differentiable collectives, and the layers of tensor parallelism."""
