"""Know your network and your data: measurements that change nothing."""
