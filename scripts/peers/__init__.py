"""Programs that run the same model, a module each, behind one small interface. See scripts/bench_peers.py."""
