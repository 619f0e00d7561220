"""What a trained network's filters show: localization from feature maps."""
