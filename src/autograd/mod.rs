//! Gradient hooks, custom functions, and a backward that gives typed errors.
