"""What a KVCache is made of: pages, addresses, who has which page, and when a page may go."""
