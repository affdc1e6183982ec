"""Puzzles as rows of tokens: Sudoku, mazes and ARC, generated or read from files, and the stream of training
batches."""

from ruvjax.data.puzzles.arc import ArcAugmentation, ArcSource, versions
from ruvjax.data.puzzles.files import MazeCsvSource, SudokuCsvSource
from ruvjax.data.puzzles.maze import MazeSource
from ruvjax.data.puzzles.stream import PuzzleBatch, PuzzleSet, PuzzleStream, evaluation_puzzles
from ruvjax.data.puzzles.sudoku import SudokuSource
from ruvjax.data.puzzles.text import parse_board, show_board
from ruvjax.data.puzzles.voting import restored, vote, write_submission

__all__ = [
    "ArcAugmentation",
    "ArcSource",
    "MazeCsvSource",
    "MazeSource",
    "PuzzleBatch",
    "PuzzleSet",
    "PuzzleStream",
    "SudokuCsvSource",
    "SudokuSource",
    "evaluation_puzzles",
    "parse_board",
    "restored",
    "show_board",
    "versions",
    "vote",
    "write_submission",
]
