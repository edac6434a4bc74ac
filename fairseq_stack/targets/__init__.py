"""The teacher's targets, stored once and read again."""
