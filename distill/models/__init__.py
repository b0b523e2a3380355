"""Networks: teachers, students and what stands between them and diffusers."""
