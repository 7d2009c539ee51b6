"""How pack writes what a source holds: shards, their records, a contact sheet, and what it says at the end."""
