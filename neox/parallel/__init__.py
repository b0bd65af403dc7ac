"""Layouts over processes: the mesh, collectives that autograd understands, and the layers that are cut over a tensor group."""
