"""What a layout costs, before anything starts. Pure: no torch, no Ray, no clock."""
