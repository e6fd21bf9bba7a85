TILE = (128, 128)
panel_config = None
