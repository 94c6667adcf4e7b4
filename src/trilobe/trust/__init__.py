"""What judges a model: metrics with intervals, attacks, explanations, gates, the card. Nobody below may import it."""
