"""The demo: a real 135M language model distilled into a chain, models of six sizes made from it, all measured."""
