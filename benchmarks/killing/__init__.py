"""What kill_saves.py consists of: processes that are stopped, small disks, and saves of one model over another."""
