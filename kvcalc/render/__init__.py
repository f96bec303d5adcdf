"""What people and programs read: renderables know no domain rules, and only `text` imports rich."""
