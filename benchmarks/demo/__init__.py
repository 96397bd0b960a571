"""The main job on real data: handwritten digits, trained with torch's Adam and ours from one seed."""
