"""What judges a model: metrics with intervals, attacks, explanations, gates and the card. Nobody below may import it."""
