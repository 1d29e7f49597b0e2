"""Twenty things that people ask."""

QUESTIONS = (
    "What is the capital of France?",
    "Who wrote Romeo and Juliet?",
    "What is two plus two?",
    "Name three fruits.",
    "Write a haiku about the sea.",
    "Why is the sky blue?",
    "What is the largest planet in the solar system?",
    "Translate 'good morning' into Spanish.",
    "Give me a recipe for pancakes.",
    "What is photosynthesis?",
    "Tell me a short story about a fox.",
    "How many days are in a week?",
    "What is the boiling point of water?",
    "Explain gravity to a child.",
    "List the primary colours.",
    "What does a router do?",
    "Write a Python function that adds two numbers.",
    "Who painted the Mona Lisa?",
    "What is the opposite of hot?",
    "Say hello in five languages.",
)
