/* Classifies an image with a .rdp network: the five likeliest classes and their probabilities, without Python.
 *
 *     classify NETWORK.rdp IMAGE [THREADS]      IMAGE: a binary PPM (P6) for three channels, PGM (P5) for one
 *
 * The image is made ready as rd_deploy/preprocessing.py does it. A mistake is one line on stderr and exit code 2.
 */
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rd.h"

#define TOP 5
#define MAX_PIXELS (1u << 26) /* of an image, before and after it is resized */

static void fail(const char *subject, const char *reason) {
    fprintf(stderr, "classify: %s: %s\n", subject, reason);
    exit(2);
}

static void check(rd_status status) {
    if (status != RD_OK) fail("error", rd_last_error());
}

static void *allocate(size_t count, size_t size) {
    void *const memory = calloc(count, size);
    if (!memory) fail("error", "not enough memory");
    return memory;
}

/* --- images */

typedef struct {
    uint32_t height, width, channels;
    uint8_t *pixels; /* [height][width][channels] */
} Image;

/* The next number of a header, and the character after it; comments reach from # to the end of the line. */
static uint32_t read_number(FILE *file) {
    int c = fgetc(file);
    uint32_t value = 0;
    while (isspace(c) || c == '#') {
        if (c == '#')
            while (c != '\n' && c != EOF) c = fgetc(file);
        c = fgetc(file);
    }
    for (; isdigit(c); c = fgetc(file)) value = value > MAX_PIXELS ? value : value * 10 + (uint32_t)(c - '0');
    return isspace(c) ? value : 0;
}

static Image read_image(const char *path) {
    Image image = {0, 0, 0, NULL};
    FILE *const file = fopen(path, "rb");
    if (!file) fail(path, strerror(errno));
    const int p = fgetc(file), kind = fgetc(file);
    image.channels = p != 'P' ? 0 : kind == '6' ? 3 : kind == '5' ? 1 : 0;
    if (image.channels == 0) fail(path, "is no binary PPM or PGM image (P6 or P5)");
    image.width = read_number(file);
    image.height = read_number(file);
    if (image.width == 0 || image.height == 0 || image.height > MAX_PIXELS / image.width)
        fail(path, "has no usable size");
    if (read_number(file) != 255) fail(path, "needs 8 bits per value (a maximum of 255)");
    const size_t bytes = (size_t)image.height * image.width * image.channels;
    image.pixels = allocate(bytes, 1);
    if (fread(image.pixels, 1, bytes, file) != bytes) fail(path, "ends before its last pixel");
    fclose(file);
    return image;
}

/* Resize one side of [outer][from][inner] to `to`, with the triangle filter: as wide as the step when shrinking, which
 * is the antialiasing. Frees `in`. */
static uint8_t *resize_side(uint8_t *in, size_t outer, uint32_t from, size_t inner, uint32_t to) {
    const double step = (double)from / to, radius = step > 1 ? step : 1;
    const int taps = (int)ceil(2 * radius) + 1;
    uint8_t *const out = allocate(outer * to, inner);
    double *const weights = allocate((size_t)taps, sizeof *weights);
    for (uint32_t i = 0; i < to; i++) {
        const double centre = (i + 0.5) * step;
        const long first = (long)floor(centre - radius), last = (long)from - 1;
        double sum = 0;
        for (int t = 0; t < taps; t++) {
            const double weight = 1 - fabs(first + t + 0.5 - centre) / radius;
            weights[t] = weight > 0 && first + t >= 0 && first + t <= last ? weight : 0;
            sum += weights[t];
        }
        for (size_t o = 0; o < outer; o++)
            for (size_t n = 0; n < inner; n++) {
                float total = 0;
                for (int t = 0; t < taps; t++)
                    if (weights[t] > 0)
                        total += in[(o * from + (size_t)(first + t)) * inner + n] * (float)(weights[t] / sum);
                out[(o * to + i) * inner + n] = (uint8_t)fminf(rintf(total), 255);
            }
    }
    free(weights);
    free(in);
    return out;
}

/* Make the shorter side `shorter` pixels long. */
static void resize(Image *image, uint32_t shorter) {
    const uint32_t height = image->height, width = image->width, least = height < width ? height : width;
    if (least == shorter) return;
    const double longer = floor((double)shorter * (height > width ? height : width) / least);
    if (longer * shorter > MAX_PIXELS) fail("error", "the image is too elongated to be resized; crop it");
    image->width = height <= width ? (uint32_t)longer : shorter;
    image->height = height <= width ? shorter : (uint32_t)longer;
    image->pixels = resize_side(image->pixels, height, width, image->channels, image->width);
    image->pixels = resize_side(image->pixels, 1, height, (size_t)image->width * image->channels, image->height);
}

/* First pixel of a centre crop: half the difference, rounded to even. */
static uint32_t crop_offset(uint32_t length, uint32_t size) {
    const uint32_t half = (length - size) / 2;
    return (length - size) % 2 ? half + half % 2 : half;
}

/* The network's input, [channels][size][size]: resized, padded with black, cropped, normalised. */
static float *prepare(Image *image, const rd_preprocessing *how) {
    if (image->channels != how->channels) fail("error", "the image has other channels than the network's input");
    resize(image, how->resize);
    const uint32_t top = crop_offset(image->height + 2 * how->pad, how->size);
    const uint32_t left = crop_offset(image->width + 2 * how->pad, how->size);
    float *const out = allocate((size_t)how->channels * how->size * how->size, sizeof *out), *at = out;
    for (uint32_t c = 0; c < how->channels; c++) {
        const float scale = (float)(1 / (255.0 * how->std[c])), shift = how->mean[c] / how->std[c];
        for (uint32_t y = 0; y < how->size; y++)
            for (uint32_t x = 0; x < how->size; x++) {
                const uint32_t row = top + y - how->pad, column = left + x - how->pad; /* wrap around in the padding */
                const int inside = row < image->height && column < image->width;
                const size_t pixel = ((size_t)row * image->width + column) * image->channels + c;
                *at++ = (inside ? image->pixels[pixel] : 0) * scale - shift;
            }
    }
    return out;
}

/* --- classes */

/* Logits to probabilities. */
static void softmax(float *values, uint32_t count) {
    float largest = values[0];
    double sum = 0;
    for (uint32_t i = 1; i < count; i++) largest = fmaxf(largest, values[i]);
    for (uint32_t i = 0; i < count; i++) sum += values[i] = expf(values[i] - largest);
    for (uint32_t i = 0; i < count; i++) values[i] = (float)(values[i] / sum);
}

/* The likeliest first; each is struck out once it was printed. */
static void print_likeliest(const rd_network *network, float *probabilities, uint32_t count) {
    for (uint32_t n = 0; n < TOP && n < count; n++) {
        uint32_t best = 0;
        for (uint32_t i = 1; i < count; i++)
            if (probabilities[i] > probabilities[best]) best = i;
        printf("%.6f  %s\n", probabilities[best], rd_network_class(network, best));
        probabilities[best] = -1;
    }
}

int main(int count, char **arguments) {
    if (count != 3 && count != 4) fail("usage", "classify NETWORK.rdp IMAGE [THREADS]");
    rd_network *network = NULL;
    rd_plan *plan = NULL;
    rd_context *context = NULL;
    rd_network_info info;
    rd_preprocessing how;
    check(rd_network_load(arguments[1], &network));
    check(rd_network_get_info(network, &info));
    check(rd_network_get_preprocessing(network, &how));
    Image image = read_image(arguments[2]);
    float *const input = prepare(&image, &how);

    rd_options options = {0};
    options.batch = 1;
    options.threads = count == 4 ? (uint32_t)strtoul(arguments[3], NULL, 10) : 1;
    options.height = options.width = how.size;
    check(rd_plan_create(network, &options, &plan));
    check(rd_context_create(plan, NULL, 0, &context));
    float *const logits = allocate(info.classes, sizeof *logits);
    check(rd_context_run(context, input, logits));
    softmax(logits, info.classes);
    print_likeliest(network, logits, info.classes);

    rd_context_free(context);
    rd_plan_free(plan);
    rd_network_free(network);
    free(logits);
    free(input);
    free(image.pixels);
    return 0;
}
