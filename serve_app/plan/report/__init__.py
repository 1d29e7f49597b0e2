"""What a planner answers as one page of HTML: a part of the page in each module."""
