"""Calls on the workers of a cluster: dask.distributed or Ray behind one small interface.

``addresses.connect`` gives :class:`~servegym.envs.playing.nodes.driver.Nodes`, which takes the place of a
number of processes wherever ``run_parallel`` is told how many. ``worker`` is what runs on the other side,
``carry`` how calls and the files that they need get there.
"""
