"""What the processes of one service tell each other, through Redis alone."""
